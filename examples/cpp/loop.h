// A denoising loop with the graphs of a bundle, for any runtime: in each step the graph that the manifest's example names,
// after its prelude and its table if it has them.
// docs/bundle.md explains the contents of a bundle. The scheduler is DDIM without noise.
//
//     denoise BUNDLE INPUTS GUIDANCE_SCALE OUT.npy
//
// INPUTS is a folder written by write_inputs.py. It contains an .npy file for each argument of the denoiser (with both
// halves in its batch under guidance), for the initial latents, for the timesteps, and for the cumulative products of
// alphas before and after each step.
//
// A `Runtime` runs the graphs of a bundle on its own tensor type:
//
//     using Tensor = ...;
//     Runtime(const std::string& bundle, const Json& manifest);
//     std::vector<Tensor> run(const std::string& graph, std::vector<Tensor> inputs);
//     static Tensor from(Array array);
//     static Array to(const Tensor& tensor);
//     static Tensor half(const Tensor& tensor, int position);  // of the first dimension
//     static Tensor twice(const Tensor& tensor);               // in the first dimension
//     static Tensor sum(double a, const Tensor& x, double b, const Tensor& y);  // a * x + b * y
//     static Tensor weighted(const std::vector<double>& weights, const std::vector<Tensor>& values);  // in float at least
#pragma once

#include <cmath>
#include <exception>
#include <iostream>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "json.h"
#include "npy.h"

// The denoiser of one generation.
template <typename Runtime>
class Denoiser {
 public:
  using Tensor = typename Runtime::Tensor;

  // `timesteps` are those of the steps to come, for which the rows of tables are computed together.
  Denoiser(const std::string& bundle, const Json& manifest, std::vector<float> timesteps)
      : manifest_(manifest), runtime_(bundle, manifest_), timesteps_(std::move(timesteps)) {
    if (manifest_["method"].members().count("rule")) throw std::runtime_error("not in this example: method.rule");
    if (manifest_["schema_version"].integer() > 3) throw std::runtime_error("not in this example: a newer schema version");
    const Json& family = manifest_["family"];
    for (const char* key : {"calls", "interleaved", "repeated", "shared"})
      if (!family[key].items().empty()) throw std::runtime_error(std::string("not in this example: family.") + key);
    kept_half_ = family["order"].items()[0].text() == manifest_["method"]["keep"].text() ? 0 : 1;
    cond_half_ = family["order"].items()[0].text() == "cond" ? 0 : 1;
    guided_ = manifest_["example"]["guided"].is_true();
  }

  const std::vector<Json>& steps() const { return manifest_["example"]["steps"].items(); }
  const std::string& latents() const { return manifest_["denoiser"]["latents"].text(); }

  // Returns the guided prediction for `latents` at step `number`; `arguments` are the same for all steps.
  Tensor predict(size_t number, const Tensor& latents, float timestep, double scale,
                 const std::map<std::string, Tensor>& arguments) {
    const Json& step = steps()[number];
    const std::string& name = step["graph"].text();
    const Json& graph = manifest_["graphs"][name];
    const bool guided = step["phase"]["guided"].is_true();
    const bool halved = guided_ && !guided;

    run_early(name, number, latents, timestep, arguments);
    std::vector<Tensor> inputs = own_inputs(graph, number, latents, timestep, arguments);
    for (const Json& spec : listed(graph, "early_inputs")) inputs.push_back(early_value(spec["name"].text(), timestep));
    for (const Json& spec : graph["cache_inputs"].items()) {
      const std::vector<double> weights = weights_of(step, spec["kind"].text());
      std::vector<Tensor> values;
      for (const Cache& cache : caches_.at({spec["kind"].text(), spec["site"].text()}))
        if (values.size() < weights.size())
          values.push_back(halved && cache.has_halves ? Runtime::half(cache.value, kept_half_) : cache.value);
      if (values.size() < weights.size()) throw std::runtime_error("a forecast needs more values than were kept");
      inputs.push_back(values.size() == 1 ? values[0] : Runtime::weighted(weights, values));
    }

    std::vector<Tensor> outputs = runtime_.run(name, std::move(inputs));
    size_t position = graph["outputs"].items().size();
    for (const Json& spec : graph["cache_outputs"].items()) {
      const bool merged = spec["merged"].is_true();
      if (names(step["phase"][merged ? "merge" : "emit"]).count(spec["kind"].text())) {
        std::vector<Cache>& kept = caches_[{spec["kind"].text(), spec["site"].text()}];
        kept.insert(kept.begin(), {outputs[position], guided && !merged});
        if (kept.size() > order_of(spec["kind"].text()) + 1) kept.pop_back();
      }
      ++position;
    }
    if (!guided) return outputs[0];  // it is the prediction of both halves
    const Tensor cond = Runtime::half(outputs[0], cond_half_), uncond = Runtime::half(outputs[0], 1 - cond_half_);
    return Runtime::sum(1 - scale, uncond, scale, cond);
  }

 private:
  struct Cache {
    Tensor value;
    bool has_halves;
  };

  static std::set<std::string> names(const Json& list) {
    std::set<std::string> found;
    for (const Json& name : list.items()) found.insert(name.text());
    return found;
  }

  // Returns the weights with which the last values of a kind are added up in a step, newest first: one, if the last value is
  // reused as it is.
  static std::vector<double> weights_of(const Json& step, const std::string& kind) {
    std::vector<double> weights;
    if (step.members().count("weights") && step["weights"].members().count(kind))
      for (const Json& weight : step["weights"][kind].items()) weights.push_back(weight.number());
    return weights.empty() ? std::vector<double>{1} : weights;
  }

  // Returns the order of the forecast for the values of a kind; 0 if they are reused as they are.
  size_t order_of(const std::string& kind) const {
    const Json& method = manifest_["method"];
    if (!method.members().count("forecasts") || !method["forecasts"].members().count(kind)) return 0;
    return static_cast<size_t>(method["forecasts"][kind].integer());
  }

  // Returns the list `key` of a graph, which is missing in bundles of schema version 1.
  static std::vector<Json> listed(const Json& graph, const std::string& key) {
    return graph.members().count(key) ? graph[key].items() : std::vector<Json>();
  }

  // Returns those of a graph's inputs that are arguments of the denoiser, for step `number`.
  std::vector<Tensor> own_inputs(const Json& graph, size_t number, const Tensor& latents, float timestep,
                                 const std::map<std::string, Tensor>& arguments) {
    const bool guided = steps()[number]["phase"]["guided"].is_true();
    std::vector<Tensor> inputs;
    for (const Json& spec : graph["inputs"].items()) {
      const std::string& input = spec["name"].text();
      if (input == this->latents()) {
        inputs.push_back(guided ? Runtime::twice(latents) : latents);
      } else if (input == "timestep") {
        inputs.push_back(Runtime::from({{}, {timestep}}));
      } else {
        inputs.push_back(guided_ && !guided ? Runtime::half(arguments.at(input), kept_half_) : arguments.at(input));
      }
    }
    return inputs;
  }

  // Runs the prelude and the table of the graph `name`, unless their values are known. When the graph is first needed, the
  // prelude runs once, and the table runs for each timestep that the graph serves, so that a runtime with one graph at a
  // time in memory loads each part once.
  void run_early(const std::string& name, size_t number, const Tensor& latents, float timestep,
                 const std::map<std::string, Tensor>& arguments) {
    if (early_name_ != name) {
      early_.clear();  // this example returns to no graph, so these values are not needed any more
      rows_.clear();
      early_name_ = name;
    }
    for (const std::string stage : {"prelude", "table"}) {
      const std::string part = part_of(name, stage);
      if (part.empty() || (stage == "prelude" ? !early_.empty() : rows_.count(timestep) > 0)) continue;
      std::set<float> times = {timestep};
      if (stage == "table")
        for (size_t i = number; i < steps().size() && i < timesteps_.size(); ++i)
          if (steps()[i]["graph"].text() == name) times.insert(timesteps_[i]);
      const Json& graph = manifest_["graphs"][part];
      for (const float time : times) {
        std::vector<Tensor> inputs = own_inputs(graph, number, latents, time, arguments);
        for (const Json& spec : listed(graph, "early_inputs")) inputs.push_back(early_.at(spec["name"].text()));
        const std::vector<Tensor> outputs = runtime_.run(part, std::move(inputs));
        size_t position = 0;
        for (const Json& spec : graph["outputs"].items())
          (stage == "table" ? rows_[time] : early_)[spec["name"].text()] = outputs[position++];
      }
    }
  }

  const Tensor& early_value(const std::string& name, float timestep) const {
    const auto found = early_.find(name);
    return found == early_.end() ? rows_.at(timestep).at(name) : found->second;
  }

  // Returns the prelude or the table of the graph `name`, directly or through its table; empty if there is none.
  std::string part_of(const std::string& name, const std::string& stage) const {
    for (const Json& spec : listed(manifest_["graphs"][name], "early_inputs")) {
      const std::string part = spec["graph"].text();
      if (manifest_["graphs"][part]["stage"].text() == stage) return part;
      const std::string before = part_of(part, stage);
      if (!before.empty()) return before;
    }
    return "";
  }

  Json manifest_;
  Runtime runtime_;
  std::vector<float> timesteps_;
  std::string early_name_;  // the graph that the next two belong to
  std::map<std::string, Tensor> early_;  // the values of its prelude
  std::map<float, std::map<std::string, Tensor>> rows_;  // the values of its table, by timestep
  // By kind and site: the last values, newest first; more than one if they are forecast.
  std::map<std::pair<std::string, std::string>, std::vector<Cache>> caches_;
  int kept_half_ = 0, cond_half_ = 1;
  bool guided_ = false;
};

// A DDIM step without noise, from the cumulative product of alphas `now` to the one after the step.
template <typename Runtime>
typename Runtime::Tensor ddim(const typename Runtime::Tensor& latents, const typename Runtime::Tensor& prediction,
                              double now, double next, const std::string& prediction_type) {
  const double image = std::sqrt(now), noise = std::sqrt(1 - now);
  const double next_image = std::sqrt(next), next_noise = std::sqrt(1 - next);
  if (prediction_type == "epsilon")
    return Runtime::sum(next_image / image, latents, next_noise - next_image * noise / image, prediction);
  if (prediction_type == "v_prediction")
    return Runtime::sum(next_image * image + next_noise * noise, latents, next_noise * image - next_image * noise,
                        prediction);
  throw std::runtime_error("no prediction type " + prediction_type + " in this example");
}

template <typename Runtime>
void denoise(const std::string& bundle, const std::string& inputs, double scale, const std::string& out) {
  using Tensor = typename Runtime::Tensor;
  const Json manifest = Json::read(bundle + "/manifest.json");
  const Array timesteps = read_npy(inputs + "/timesteps.npy"), alphas = read_npy(inputs + "/alphas.npy");
  Denoiser<Runtime> denoiser(bundle, manifest, timesteps.data);
  const std::string scheduler = manifest["scheduler"]["class_name"].text();
  if (scheduler != "DDIMScheduler")
    throw std::runtime_error("The bundle's scheduler is a " + scheduler + ", but this program only supports DDIMScheduler. " +
                             "Export the bundle from a pipeline with that one.");
  const std::string prediction_type = manifest["scheduler"]["config"]["prediction_type"].text();
  Tensor latents = Runtime::from(read_npy(inputs + "/latents.npy"));
  std::map<std::string, Tensor> arguments;
  for (const Json& argument : manifest["denoiser"]["arguments"].items()) {
    const std::string& name = argument.text();
    if (name != denoiser.latents() && name != "timestep")
      arguments.emplace(name, Runtime::from(read_npy(inputs + "/" + name + ".npy")));
  }
  for (size_t i = 0; i < denoiser.steps().size(); ++i) {
    const Tensor prediction = denoiser.predict(i, latents, timesteps.data.at(i), scale, arguments);
    latents = ddim<Runtime>(latents, prediction, alphas.data.at(2 * i), alphas.data.at(2 * i + 1), prediction_type);
    std::cout << "step " << i << ": " << denoiser.steps()[i]["graph"].text() << "\n";
  }
  write_npy(out, Runtime::to(latents));
}

// Runs a program and returns its exit code; to be called by `main`.
template <typename Runtime>
int denoise_main(int count, char** given) {
  if (count != 5) {
    std::cerr << "usage: denoise BUNDLE INPUTS GUIDANCE_SCALE OUT.npy\n";
    return 2;
  }
  try {
    denoise<Runtime>(given[1], given[2], std::stod(given[3]), given[4]);
    return 0;
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
