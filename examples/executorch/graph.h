// A method of an ExecuTorch program, loaded for the lifetime of the object.
#pragma once

#include <executorch/extension/tensor/tensor_ptr.h>
#include <executorch/runtime/core/data_loader.h>
#include <executorch/runtime/executor/program.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "npy.h"

namespace et = executorch::runtime;

template <typename T>
T taken(et::Result<T> result, const std::string& what) {
  if (!result.ok())
    throw std::runtime_error("ExecuTorch cannot " + what + ": error " + std::to_string(int(result.error())));
  return std::move(result.get());
}

inline void check(et::Error error, const std::string& what) {
  if (error != et::Error::Ok)
    throw std::runtime_error("ExecuTorch cannot " + what + ": error " + std::to_string(int(error)));
}

// A memory-mapped file, shared by all methods.
class MappedFile final : public et::DataLoader {
 public:
  explicit MappedFile(const std::string& path) {
    const int file = open(path.c_str(), O_RDONLY);
    struct stat status {};
    if (file < 0 || fstat(file, &status) != 0) throw std::runtime_error("cannot read " + path);
    size_ = static_cast<size_t>(status.st_size);
    content_ = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file, 0);
    close(file);
    if (content_ == MAP_FAILED) throw std::runtime_error("cannot map " + path);
  }
  ~MappedFile() override { munmap(content_, size_); }

  et::Result<et::FreeableBuffer> load(size_t offset, size_t size, const SegmentInfo&) const override {
    if (offset > size_ || size > size_ - offset) return et::Error::InvalidArgument;
    return et::FreeableBuffer(static_cast<const char*>(content_) + offset, size, nullptr);
  }
  et::Result<size_t> size() const override { return size_; }

 private:
  void* content_;
  size_t size_;
};

// Allocates memory from the system, and frees it in `reset` and in the destructor.
class Memory final : public et::MemoryAllocator {
 public:
  Memory() : et::MemoryAllocator(0, nullptr) {}
  ~Memory() override { reset(); }

  void* allocate(size_t size, size_t alignment = kDefaultAlignment) override {
    blocks_.push_back(std::make_unique<char[]>(size + alignment));
    const auto address = reinterpret_cast<uintptr_t>(blocks_.back().get());
    return reinterpret_cast<void*>((address + alignment - 1) / alignment * alignment);
  }
  void reset() override { blocks_.clear(); }

 private:
  std::vector<std::unique_ptr<char[]>> blocks_;
};

class Graph {
 public:
  Graph(const et::Program& program, const std::string& name)
      : name_(name),
        planned_(buffers(program, name)),
        planned_memory_({spans_.data(), spans_.size()}),
        manager_(&memory_, &planned_memory_, &temporary_),
        method_(taken(program.load_method(name.c_str(), &manager_), "load " + name)) {}

  std::vector<Array> run(const std::vector<Array>& inputs) {
    std::vector<executorch::extension::TensorPtr> held;
    for (size_t i = 0; i < inputs.size(); ++i) {
      held.push_back(as_input(i, inputs[i]));
      check(method_.set_input(et::EValue(*held.back()), i), "take input " + std::to_string(i) + " of " + name_);
    }
    check(method_.execute(), "run " + name_);
    std::vector<Array> outputs;
    for (size_t i = 0; i < method_.outputs_size(); ++i) {
      const executorch::aten::Tensor given = method_.get_output(i).toTensor();
      if (given.scalar_type() != executorch::aten::ScalarType::Float)
        throw std::runtime_error("not in this example: outputs that are not float32");
      const float* data = given.const_data_ptr<float>();
      outputs.push_back({{given.sizes().begin(), given.sizes().end()}, {data, data + given.numel()}});
    }
    return outputs;
  }

 private:
  // Returns `array`, which must outlive the result, in the dtype of the input at `position`.
  executorch::extension::TensorPtr as_input(size_t position, const Array& array) const {
    const et::MethodMeta meta = method_.method_meta();
    const auto info = taken(meta.input_tensor_meta(position), "describe input " + std::to_string(position) + " of " + name_);
    std::vector<executorch::aten::SizesType> sizes(array.shape.begin(), array.shape.end());
    if (info.scalar_type() == executorch::aten::ScalarType::Float)  // the data is only read
      return executorch::extension::make_tensor_ptr(std::move(sizes), const_cast<float*>(array.data.data()));
    if (info.scalar_type() == executorch::aten::ScalarType::Long)
      return executorch::extension::make_tensor_ptr(std::move(sizes),
                                                    std::vector<int64_t>(array.data.begin(), array.data.end()));
    throw std::runtime_error("not in this example: inputs that are neither float32 nor int64");
  }

  std::vector<std::vector<uint8_t>> buffers(const et::Program& program, const std::string& name) {
    const et::MethodMeta meta = taken(program.method_meta(name.c_str()), "find " + name);
    std::vector<std::vector<uint8_t>> found;
    for (size_t i = 0; i < meta.num_memory_planned_buffers(); ++i)
      found.emplace_back(static_cast<size_t>(taken(meta.memory_planned_buffer_size(i), "plan the memory of " + name)));
    for (auto& buffer : found) spans_.emplace_back(buffer.data(), buffer.size());
    return found;
  }

  std::string name_;
  std::vector<et::Span<uint8_t>> spans_;
  std::vector<std::vector<uint8_t>> planned_;
  et::HierarchicalAllocator planned_memory_;
  Memory memory_, temporary_;
  et::MemoryManager manager_;
  et::Method method_;
};
