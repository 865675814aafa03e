// Runs the denoising loop of a bundle of format "aoti" without Python. loop.h contains the loop and explains the
// arguments.

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <unistd.h>

#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "loop.h"

using torch::inductor::AOTIModelPackageLoader;

at::ScalarType dtype_called(const std::string& name) {
  static const std::map<std::string, at::ScalarType> dtypes = {
      {"float32", at::kFloat}, {"float16", at::kHalf}, {"bfloat16", at::kBFloat16}, {"float64", at::kDouble},
      {"int64", at::kLong},    {"int32", at::kInt},    {"uint8", at::kByte},        {"bool", at::kBool},
  };
  const auto found = dtypes.find(name);
  if (found == dtypes.end()) throw std::runtime_error("no dtype " + name + " in this example");
  return found->second;
}

// The weights of all graphs, memory-mapped once.
class Weights {
 public:
  explicit Weights(const std::string& bundle) : index_(Json::read(bundle + "/graphs/weights.json")) {
    const std::string path = bundle + "/graphs/weights.bin";
    const int file = open(path.c_str(), O_RDONLY);
    struct stat status {};
    if (file < 0 || fstat(file, &status) != 0) throw std::runtime_error("cannot read " + path);
    void* mapped = mmap(nullptr, status.st_size, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
    close(file);
    if (mapped == MAP_FAILED) throw std::runtime_error("cannot map " + path);
    content_ = static_cast<char*>(mapped);
  }

  std::unordered_map<std::string, at::Tensor> tensors(const std::vector<std::string>& names) const {
    std::unordered_map<std::string, at::Tensor> found;
    for (const std::string& name : names) {
      const Json& place = index_[name];
      std::vector<int64_t> shape;
      for (const Json& size : place["shape"].items()) shape.push_back(size.integer());
      const at::TensorOptions options(dtype_called(place["dtype"].text()));
      found.emplace(name, at::from_blob(content_ + place["offset"].integer(), shape, options));
    }
    return found;
  }

 private:
  Json index_;
  char* content_;
};

// Runs the graphs with AOTInductor's runtime, and keeps those that have run in memory.
class Aoti {
 public:
  using Tensor = at::Tensor;

  Aoti(const std::string& bundle, const Json& manifest)
      : bundle_(bundle), specs_(manifest["graphs"]), weights_(bundle) {}

  std::vector<Tensor> run(const std::string& graph, std::vector<Tensor> inputs) {
    size_t position = 0;
    for (const Json& spec : specs_[graph]["inputs"].items()) {
      inputs[position] = inputs[position].to(dtype_called(spec["dtype"].text())).contiguous();
      ++position;
    }
    return opened(graph).boxed_run(std::move(inputs));
  }

  static Tensor from(Array array) { return at::from_blob(array.data.data(), array.shape, at::kFloat).clone(); }
  static Array to(const Tensor& tensor) {
    const Tensor given = tensor.to(at::kCPU, at::kFloat).contiguous();
    const float* data = given.const_data_ptr<float>();
    return {given.sizes().vec(), {data, data + given.numel()}};
  }
  static std::vector<int64_t> shape(const Tensor& tensor) { return tensor.sizes().vec(); }
  static Tensor half(const Tensor& tensor, int position) { return tensor.chunk(2)[position].contiguous(); }
  static Tensor twice(const Tensor& tensor) { return at::cat({tensor, tensor}); }
  static Tensor sum(double a, const Tensor& x, double b, const Tensor& y) { return a * x + b * y; }
  static Tensor weighted(const std::vector<double>& weights, const std::vector<Tensor>& values) {
    Tensor total = weights[0] * values[0].to(at::kFloat);
    for (size_t i = 1; i < weights.size(); ++i) total += weights[i] * values[i].to(at::kFloat);
    if (values[0].scalar_type() == at::kHalf) total = total.clamp(-65504, 65504);  // the largest numbers, not infinity
    return total.to(values[0].scalar_type());
  }

 private:
  AOTIModelPackageLoader& opened(const std::string& name) {
    if (!graphs_.count(name)) {
      const Json& graph = specs_[name];
      auto loader = std::make_unique<AOTIModelPackageLoader>(bundle_ + "/" + graph["file"].text(), graph["entry"].text());
      auto constants = weights_.tensors(loader->get_constant_fqns());
      loader->load_constants(constants, /*use_inactive=*/false, /*check_full_update=*/true, /*user_managed=*/true);
      graphs_.emplace(name, std::move(loader));
    }
    return *graphs_.at(name);
  }

  std::string bundle_;
  Json specs_;
  Weights weights_;
  std::map<std::string, std::unique_ptr<AOTIModelPackageLoader>> graphs_;
};

int main(int count, char** given) {
  const c10::InferenceMode no_gradients;
  return denoise_main<Aoti>(count, given);
}
