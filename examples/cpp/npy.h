// Read and write NumPy's .npy files: float32, in C order, little-endian.
#pragma once

#include <cstdint>
#include <fstream>
#include <functional>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

struct Array {
  std::vector<int64_t> shape;
  std::vector<float> data;

  size_t size() const { return std::accumulate(shape.begin(), shape.end(), size_t{1}, std::multiplies<>()); }
};

inline Array read_npy(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  char start[10];  // magic, version 1.0, length of the header
  if (!file.read(start, sizeof start)) throw std::runtime_error("cannot read " + path);
  std::string header(static_cast<uint8_t>(start[8]) | static_cast<uint8_t>(start[9]) << 8, ' ');
  file.read(header.data(), static_cast<std::streamsize>(header.size()));
  if (header.find("'<f4'") == std::string::npos || header.find("'fortran_order': False") == std::string::npos)
    throw std::runtime_error(path + " is not float32 in C order");
  Array array;
  for (size_t at = header.find("'shape': (") + 10; header[at] != ')'; ++at)
    if (header[at] >= '0' && header[at] <= '9') {
      size_t length = 0;
      array.shape.push_back(std::stoll(header.substr(at), &length));
      at += length - 1;
    }
  array.data.resize(array.size());
  if (!file.read(reinterpret_cast<char*>(array.data.data()), static_cast<std::streamsize>(array.size() * 4)))
    throw std::runtime_error(path + " is too short");
  return array;
}

inline void write_npy(const std::string& path, const Array& array) {
  std::string shape;
  for (const int64_t size : array.shape) shape += std::to_string(size) + ", ";
  std::string header = "{'descr': '<f4', 'fortran_order': False, 'shape': (" + shape + "), }";
  header.append(63 - (10 + header.size()) % 64, ' ').push_back('\n');  // the data must start at a multiple of 64
  std::ofstream file(path, std::ios::binary);
  file.write("\x93NUMPY\x01\x00", 8);
  file.put(static_cast<char>(header.size() & 0xff)).put(static_cast<char>(header.size() >> 8));
  file << header;
  file.write(reinterpret_cast<const char*>(array.data.data()), static_cast<std::streamsize>(array.size() * 4));
  if (!file) throw std::runtime_error("cannot write " + path);
}
