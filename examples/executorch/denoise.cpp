// Runs the denoising loop of a bundle of format "executorch" without Python and PyTorch. ../cpp/loop.h contains the loop
// and explains the arguments.

#include <executorch/runtime/platform/runtime.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "graph.h"
#include "loop.h"

// Runs the graphs with ExecuTorch's runtime, with one graph at a time in memory.
class ExecuTorch {
 public:
  using Tensor = Array;

  ExecuTorch(const std::string& bundle, const Json& manifest)
      : specs_(manifest["graphs"]),
        file_(bundle + "/" + specs_.members().begin()->second["file"].text()),
        program_(taken(et::Program::load(&file_, et::Program::Verification::InternalConsistency), "read the program")) {
    for (const auto& [name, graph] : specs_.members())
      for (const char* key : {"inputs", "early_inputs", "cache_inputs"})
        for (const Json& spec : graph.members().count(key) ? graph[key].items() : std::vector<Json>())
          if (spec["dtype"].text() != "float32") throw std::runtime_error("not in this example: " + spec["dtype"].text());
  }

  // Unloads the current graph before loading another one. Most schedules switch graphs only once.
  std::vector<Tensor> run(const std::string& graph, const std::vector<Tensor>& inputs) {
    if (graph_ == nullptr || graph != opened_) {
      graph_.reset();
      graph_ = std::make_unique<Graph>(program_, specs_[graph]["entry"].text());
      opened_ = graph;
    }
    return graph_->run(inputs);
  }

  static Tensor from(Array array) { return array; }
  static Array to(const Tensor& tensor) { return tensor; }
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
  std::unique_ptr<Graph> graph_;
  std::string opened_;
};

int main(int count, char** given) {
  et::runtime_init();
  return denoise_main<ExecuTorch>(count, given);
}
