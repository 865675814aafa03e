// A minimal JSON reader for a bundle's manifest and index. It assumes that they are well-formed; use `tgate-compile
// inspect` to verify a bundle.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

class Json {
 public:
  static Json read(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) throw std::runtime_error("cannot read " + path);
    const std::string text{std::istreambuf_iterator<char>(file), {}};
    const char* at = text.c_str();
    return parse(at);
  }

  const Json& operator[](const std::string& key) const {
    const auto found = members_.find(key);
    if (found == members_.end()) throw std::runtime_error("the JSON has no " + key);
    return found->second;
  }
  // Returns whether there is a member `key` that is not null.
  bool has(const std::string& key) const { return members_.count(key) && !members_.at(key).is_null(); }
  const std::vector<Json>& items() const { return items_; }
  const std::map<std::string, Json>& members() const { return members_; }
  // The content of a string, or the source text of any other value: "null", "true", "0.5".
  const std::string& text() const { return text_; }
  double number() const { return std::strtod(text_.c_str(), nullptr); }
  int64_t integer() const { return std::strtoll(text_.c_str(), nullptr, 10); }
  bool is_true() const { return text_ == "true"; }
  bool is_null() const { return text_ == "null"; }

 private:
  static void skip_spaces(const char*& at) {
    while (*at == ' ' || *at == '\n' || *at == '\r' || *at == '\t') ++at;
  }

  // Returns whether `mark` comes next, and skips it.
  static bool next_is(const char*& at, char mark) {
    skip_spaces(at);
    if (*at != mark) return false;
    ++at;
    return true;
  }

  static void expect(const char*& at, char mark) {
    if (!next_is(at, mark)) throw std::runtime_error(std::string("the JSON lacks a ") + mark);
  }

  static Json parse(const char*& at) {
    Json value;
    if (next_is(at, '{')) {
      while (!next_is(at, '}')) {
        const std::string key = parse(at).text_;
        expect(at, ':');
        value.members_.emplace(key, parse(at));
        next_is(at, ',');
      }
    } else if (next_is(at, '[')) {
      while (!next_is(at, ']')) {
        value.items_.push_back(parse(at));
        next_is(at, ',');
      }
    } else if (next_is(at, '"')) {
      value.text_ = parse_text(at);
    } else {
      while (*at && !std::strchr(",]} \n\r\t", *at)) value.text_ += *at++;
      if (value.text_.empty()) throw std::runtime_error("the JSON ends too early");
    }
    return value;
  }

  static std::string parse_text(const char*& at) {
    std::string text;
    for (; *at != '"'; ++at) {
      if (!*at) throw std::runtime_error("the JSON ends inside a string");
      if (*at == '\\') ++at;  // in names of modules and files, only \" and \\ are escaped
      text += *at;
    }
    ++at;
    return text;
  }

  std::string text_;
  std::vector<Json> items_;
  std::map<std::string, Json> members_;
};
