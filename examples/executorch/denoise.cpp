// One denoising loop from a bundle of format "executorch", without Python and without PyTorch: full graph, then pruned
// graph. One graph is in memory at a time.
//
//     denoise BUNDLE INPUTS GUIDANCE_SCALE OUT.npy
//
// INPUTS is a folder that examples/cpp/write_inputs.py has made. The scheduler is DDIM without noise. docs/bundle.md
// tells what is in a bundle.

#include <executorch/runtime/platform/runtime.h>

#include <cmath>
#include <iostream>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "graph.h"
#include "json.h"
#include "tensor.h"

// The denoiser of one generation.
class Denoiser {
 public:
  explicit Denoiser(const std::string& bundle)
      : manifest_(Json::read(bundle + "/manifest.json")),
        file_(bundle + "/" + manifest_["graphs"].members().begin()->second["file"].text()),
        program_(taken(et::Program::load(&file_, et::Program::Verification::InternalConsistency), "read the program")) {
    const Json& family = manifest_["family"];
    for (const char* key : {"calls", "interleaved", "repeated", "shared"})
      if (!family[key].items().empty()) throw std::runtime_error(std::string("not in this example: family.") + key);
    kept_half_ = family["order"].items()[0].text() == manifest_["method"]["keep"].text() ? 0 : 1;
    cond_half_ = family["order"].items()[0].text() == "cond" ? 0 : 1;
    guided_ = manifest_["example"]["guided"].is_true();
    for (const auto& [name, graph] : manifest_["graphs"].members())
      for (const char* key : {"inputs", "cache_inputs"})
        for (const Json& spec : graph[key].items())
          if (spec["dtype"].text() != "float32") throw std::runtime_error("not in this example: " + spec["dtype"].text());
  }

  const Json& manifest() const { return manifest_; }
  const std::vector<Json>& steps() const { return manifest_["example"]["steps"].items(); }
  const std::string& latents() const { return manifest_["denoiser"]["latents"].text(); }

  // The guided prediction for `latents` in step number `number`; `arguments` are those that all steps have.
  Tensor predict(size_t number, const Tensor& latents, float timestep, float scale,
                 const std::map<std::string, Tensor>& arguments) {
    const Json& step = steps()[number];
    const Json& graph = manifest_["graphs"][step["graph"].text()];
    const bool guided = step["phase"]["guided"].is_true();
    const bool halved = guided_ && !guided;

    std::vector<Tensor> inputs;
    for (const Json& spec : graph["inputs"].items()) {
      const std::string& name = spec["name"].text();
      if (name == this->latents()) {
        inputs.push_back(guided ? latents.twice() : latents);
      } else if (name == "timestep") {
        inputs.push_back({{}, {timestep}});
      } else {
        inputs.push_back(halved ? arguments.at(name).half(kept_half_) : arguments.at(name));
      }
    }
    for (const Json& spec : graph["cache_inputs"].items()) {
      const Cache& cache = caches_.at({spec["kind"].text(), spec["site"].text()});
      inputs.push_back(halved && cache.has_halves ? cache.value.half(kept_half_) : cache.value);
    }

    std::vector<Tensor> outputs = opened(graph["entry"].text()).run(inputs);
    size_t position = graph["outputs"].items().size();
    for (const Json& spec : graph["cache_outputs"].items()) {
      const bool merged = spec["merged"].is_true();
      if (names(step["phase"][merged ? "merge" : "emit"]).count(spec["kind"].text()))
        caches_[{spec["kind"].text(), spec["site"].text()}] = {outputs[position], guided && !merged};
      ++position;
    }
    if (!guided) return outputs[0];  // it stands for both halves: guidance of a prediction with itself
    Tensor prediction = outputs[0].half(1 - cond_half_);
    const Tensor cond = outputs[0].half(cond_half_);
    for (size_t i = 0; i < prediction.data.size(); ++i)
      prediction.data[i] += scale * (cond.data[i] - prediction.data[i]);
    return prediction;
  }

 private:
  struct Cache {
    Tensor value;
    bool has_halves;
  };

  // What is in memory is given back before another graph is loaded: a schedule switches once, or seldom.
  Graph& opened(const std::string& name) {
    if (graph_ == nullptr || name != opened_) {
      graph_.reset();
      graph_ = std::make_unique<Graph>(program_, name);
      opened_ = name;
    }
    return *graph_;
  }

  static std::set<std::string> names(const Json& list) {
    std::set<std::string> found;
    for (const Json& name : list.items()) found.insert(name.text());
    return found;
  }

  Json manifest_;
  MappedFile file_;
  et::Program program_;
  std::unique_ptr<Graph> graph_;
  std::string opened_;
  std::map<std::pair<std::string, std::string>, Cache> caches_;  // by kind and site
  size_t kept_half_ = 0, cond_half_ = 1;
  bool guided_ = false;
};

// One step of DDIM without noise, from the cumulative product of alphas `now` to that after the step.
Tensor ddim(Tensor latents, const Tensor& prediction, double now, double next, const std::string& prediction_type) {
  const bool velocity = prediction_type == "v_prediction";
  if (!velocity && prediction_type != "epsilon")
    throw std::runtime_error("no prediction type " + prediction_type + " in this example");
  for (size_t i = 0; i < latents.data.size(); ++i) {
    const double x = latents.data[i], v = prediction.data[i];
    const double noise = velocity ? std::sqrt(now) * v + std::sqrt(1 - now) * x : v;
    const double clean = velocity ? std::sqrt(now) * x - std::sqrt(1 - now) * v
                                  : (x - std::sqrt(1 - now) * v) / std::sqrt(now);
    latents.data[i] = static_cast<float>(std::sqrt(next) * clean + std::sqrt(1 - next) * noise);
  }
  return latents;
}

int main(int count, char** given) {
  if (count != 5) {
    std::cerr << "usage: denoise BUNDLE INPUTS GUIDANCE_SCALE OUT.npy\n";
    return 2;
  }
  const std::string bundle = given[1], inputs = given[2], out = given[4];
  try {
    const float scale = std::stof(given[3]);
    et::runtime_init();
    Denoiser denoiser(bundle);
    Tensor latents = read_npy(inputs + "/latents.npy");
    const Tensor timesteps = read_npy(inputs + "/timesteps.npy"), alphas = read_npy(inputs + "/alphas.npy");
    std::map<std::string, Tensor> arguments;
    for (const Json& argument : denoiser.manifest()["denoiser"]["arguments"].items()) {
      const std::string& name = argument.text();
      if (name != denoiser.latents() && name != "timestep")
        arguments.emplace(name, read_npy(inputs + "/" + name + ".npy"));
    }
    const std::string scheduler = denoiser.manifest()["scheduler"]["class_name"].text();
    if (scheduler != "DDIMScheduler")
      throw std::runtime_error("The bundle's scheduler is a " + scheduler + ", and this program has DDIMScheduler alone. " +
                               "Export the bundle from a pipeline with that one.");
    const std::string prediction_type = denoiser.manifest()["scheduler"]["config"]["prediction_type"].text();
    for (size_t i = 0; i < denoiser.steps().size(); ++i) {
      const Tensor prediction = denoiser.predict(i, latents, timesteps.data.at(i), scale, arguments);
      latents = ddim(std::move(latents), prediction, alphas.data.at(2 * i), alphas.data.at(2 * i + 1), prediction_type);
      std::cout << "step " << i << ": " << denoiser.steps()[i]["graph"].text() << "\n";
    }
    write_npy(out, latents);
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
