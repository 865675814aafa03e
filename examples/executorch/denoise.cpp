// Runs the denoising loop of a bundle of format "executorch" without Python and PyTorch. ../cpp/loop.h contains the loop
// and explains the arguments.

#include <executorch/runtime/platform/runtime.h>

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "graph.h"
#include "loop.h"

// Runs the graphs with ExecuTorch's runtime, with one graph at a time in memory, or with all of them if each step that is
// decided at run time runs two.
class ExecuTorch {
 public:
  using Tensor = Array;

  ExecuTorch(const std::string& bundle, const Json& manifest)
      : specs_(manifest["graphs"]),
        file_(bundle + "/" + specs_.members().begin()->second["file"].text()),
        program_(taken(et::Program::load(&file_, et::Program::Verification::InternalConsistency), "read the program")),
        keeps_all_(manifest["method"].has("rule")) {}

  // Unless all graphs are kept, unloads the current one before loading another. Most schedules switch graphs only once.
  std::vector<Tensor> run(const std::string& graph, const std::vector<Tensor>& inputs) {
    if (!graphs_.count(graph)) {
      if (!keeps_all_) graphs_.clear();
      graphs_.emplace(graph, std::make_unique<Graph>(program_, specs_[graph]["entry"].text()));
    }
    return graphs_.at(graph)->run(inputs);
  }

  static Tensor from(Array array) { return array; }
  static Array to(const Tensor& tensor) { return tensor; }
  static std::vector<int64_t> shape(const Tensor& tensor) { return tensor.shape; }
  static Tensor half(const Tensor& tensor, int position) {
    Tensor found{tensor.shape, {}};
    found.shape.at(0) /= 2;
    const auto begin = tensor.data.begin() + static_cast<std::ptrdiff_t>(position * found.size());
    found.data.assign(begin, begin + static_cast<std::ptrdiff_t>(found.size()));
    return found;
  }
  static Tensor twice(Tensor tensor) {
    const std::vector<float> data = tensor.data;
    tensor.shape.at(0) *= 2;
    tensor.data.insert(tensor.data.end(), data.begin(), data.end());
    return tensor;
  }
  static Tensor sum(double a, Tensor x, double b, const Tensor& y) {
    for (size_t i = 0; i < x.data.size(); ++i) x.data[i] = static_cast<float>(a * x.data[i] + b * y.data[i]);
    return x;
  }
  static Tensor weighted(const std::vector<double>& weights, const std::vector<Tensor>& values) {
    Tensor total = values[0];
    for (size_t i = 0; i < total.data.size(); ++i) {
      double sum = 0;
      for (size_t j = 0; j < weights.size(); ++j) sum += weights[j] * values[j].data[i];
      total.data[i] = static_cast<float>(sum);
    }
    return total;
  }

 private:
  Json specs_;
  MappedFile file_;
  et::Program program_;
  const bool keeps_all_;
  std::map<std::string, std::unique_ptr<Graph>> graphs_;
};

int main(int count, char** given) {
  et::runtime_init();
  return denoise_main<ExecuTorch>(count, given);
}
