// Tensors of float32 in C order, and NumPy's .npy files with them.
#pragma once

#include <cstdint>
#include <fstream>
#include <functional>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

struct Tensor {
  std::vector<int32_t> shape;
  std::vector<float> data;

  size_t size() const { return std::accumulate(shape.begin(), shape.end(), size_t{1}, std::multiplies<>()); }

  // One of the two halves of the first dimension.
  Tensor half(size_t position) const {
    Tensor found{shape, {}};
    found.shape.at(0) /= 2;
    const auto begin = data.begin() + static_cast<std::ptrdiff_t>(position * found.size());
    found.data.assign(begin, begin + static_cast<std::ptrdiff_t>(found.size()));
    return found;
  }

  Tensor twice() const {
    Tensor both = *this;
    both.shape.at(0) *= 2;
    both.data.insert(both.data.end(), data.begin(), data.end());
    return both;
  }
};

inline Tensor read_npy(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  char start[10];  // magic, version 1.0, length of the header
  if (!file.read(start, sizeof start)) throw std::runtime_error("cannot read " + path);
  std::string header(static_cast<uint8_t>(start[8]) | static_cast<uint8_t>(start[9]) << 8, ' ');
  file.read(header.data(), static_cast<std::streamsize>(header.size()));
  if (header.find("'<f4'") == std::string::npos || header.find("'fortran_order': False") == std::string::npos)
    throw std::runtime_error(path + " is not float32 in C order");
  Tensor tensor;
  for (size_t at = header.find("'shape': (") + 10; header[at] != ')'; ++at)
    if (header[at] >= '0' && header[at] <= '9') {
      size_t length = 0;
      tensor.shape.push_back(std::stoi(header.substr(at), &length));
      at += length - 1;
    }
  tensor.data.resize(tensor.size());
  if (!file.read(reinterpret_cast<char*>(tensor.data.data()), static_cast<std::streamsize>(tensor.size() * 4)))
    throw std::runtime_error(path + " is too short");
  return tensor;
}

inline void write_npy(const std::string& path, const Tensor& tensor) {
  std::string shape;
  for (const int32_t size : tensor.shape) shape += std::to_string(size) + ", ";
  std::string header = "{'descr': '<f4', 'fortran_order': False, 'shape': (" + shape + "), }";
  header.append(63 - (10 + header.size()) % 64, ' ').push_back('\n');  // data begins at a multiple of 64
  std::ofstream file(path, std::ios::binary);
  file.write("\x93NUMPY\x01\x00", 8);
  file.put(static_cast<char>(header.size() & 0xff)).put(static_cast<char>(header.size() >> 8));
  file << header;
  file.write(reinterpret_cast<const char*>(tensor.data.data()), static_cast<std::streamsize>(tensor.size() * 4));
  if (!file) throw std::runtime_error("cannot write " + path);
}
