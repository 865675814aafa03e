// A denoising loop with the graphs of a bundle, for any runtime. Each step of the manifest's example runs one graph, or, if
// it is decided at run time, a head that returns the measure and then a tail or a finish. A graph may have a prelude and a
// table, which run before it. docs/reference/bundle.md describes bundles. The scheduler is DDIM without noise.
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
//     static std::vector<int64_t> shape(const Tensor& tensor);
//     static Tensor half(const Tensor& tensor, int position);  // of the first dimension
//     static Tensor twice(const Tensor& tensor);               // in the first dimension
//     static Tensor sum(double a, const Tensor& x, double b, const Tensor& y);  // a * x + b * y
//     static Tensor weighted(const std::vector<double>& weights, const std::vector<Tensor>& values);  // in float at least
#pragma once

#include <cmath>
#include <cstdint>
#include <exception>
#include <iostream>
#include <iterator>
#include <map>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "json.h"
#include "npy.h"

// Decides the steps of one generation, in order, by the rule in `method.rule`.
class Decider {
 public:
  explicit Decider(const Json& rule)
      : threshold_(rule["threshold"].number()),
        at_threshold_(rule["at_threshold"].is_true()),
        accumulates_(rule["accumulates"].is_true()),
        most_in_row_(limit(rule["most_in_row"])),
        most_(limit(rule["most"])) {
    for (const Json& coefficient : rule["coefficients"].items()) coefficients_.push_back(coefficient.number());
  }

  // Returns whether to skip the blocks of a step with this measure. If it is NaN, they are computed.
  bool skips(double measure) {
    if (!coefficients_.empty()) {
      double value = 0;
      for (const double coefficient : coefficients_) value = value * measure + coefficient;
      measure = value;
    }
    if (accumulates_) measure = total_ += measure;
    const bool is_small = measure < threshold_ || (at_threshold_ && measure == threshold_);
    if (!is_small || in_row_ >= most_in_row_ || skipped_ >= most_) {
      computed();
      return false;
    }
    ++in_row_;
    ++skipped_;
    return true;
  }

  // Notes that a step has been computed.
  void computed() {
    total_ = 0;
    in_row_ = 0;
  }

 private:
  static int64_t limit(const Json& count) { return count.is_null() ? INT64_MAX : count.integer(); }

  double threshold_;
  bool at_threshold_, accumulates_;
  int64_t most_in_row_, most_;
  std::vector<double> coefficients_;  // the highest power first
  double total_ = 0;
  int64_t in_row_ = 0, skipped_ = 0;
};

// Returns the weights of the values of `steps`, newest first, whose sum is the forecast for `step`: a Taylor expansion with
// differences in place of derivatives.
inline std::vector<double> forecast_weights(const std::vector<size_t>& steps, size_t step) {
  const size_t count = steps.size();
  // The differences of one order at each value, as weights of the values.
  std::vector<std::vector<double>> differences(count, std::vector<double>(count, 0));
  for (size_t i = 0; i < count; ++i) differences[i][i] = 1;
  std::vector<double> weights = differences[0];
  double factor = 1;
  for (size_t order = 1; order < count; ++order) {
    factor *= (double(step) - double(steps[0])) / double(order);
    for (size_t i = 0; i + order < count; ++i)
      for (size_t j = 0; j < count; ++j)
        differences[i][j] = (differences[i][j] - differences[i + 1][j]) / (double(steps[i]) - double(steps[i + 1]));
    for (size_t j = 0; j < count; ++j) weights[j] += factor * differences[0][j];
  }
  return weights;
}

// Returns the first `count` channels of an array [rows, channels, ...].
inline Array first_channels(const Array& array, int64_t count) {
  Array found{array.shape, {}};
  found.shape.at(1) = count;
  const auto rows = static_cast<std::ptrdiff_t>(array.shape.at(0));
  const auto all = static_cast<std::ptrdiff_t>(array.size()) / rows, part = static_cast<std::ptrdiff_t>(found.size()) / rows;
  for (auto row = array.data.begin(); row != array.data.end(); row += all) found.data.insert(found.data.end(), row, row + part);
  return found;
}

// The denoiser of one generation.
template <typename Runtime>
class Denoiser {
 public:
  using Tensor = typename Runtime::Tensor;
  using Tensors = std::map<std::string, Tensor>;  // by name

  // `timesteps` are those of the steps to come, for which the rows of tables are computed together.
  Denoiser(const std::string& bundle, const Json& manifest, std::vector<float> timesteps)
      : manifest_(manifest), runtime_(bundle, manifest_), timesteps_(std::move(timesteps)) {
    if (manifest_["schema_version"].integer() > 4) throw std::runtime_error("not in this example: a newer schema version");
    const Json &family = manifest_["family"], &method = manifest_["method"];
    for (const char* key : {"calls", "interleaved", "repeated", "shared"})
      if (!family[key].items().empty()) throw std::runtime_error(std::string("not in this example: family.") + key);
    if (manifest_["denoiser"].has("image_rows")) throw std::runtime_error("not in this example: denoiser.image_rows");
    kept_half_ = family["order"].items()[0].text() == method["keep"].text() ? 0 : 1;
    cond_half_ = family["order"].items()[0].text() == "cond" ? 0 : 1;
    guided_ = manifest_["example"]["guided"].is_true();
    if (method.has("rule")) {
      decider_.emplace(method["rule"]);
      since_previous_ = method["rule"]["since"].text() == "previous";
    }
  }

  const std::vector<Json>& steps() const { return manifest_["example"]["steps"].items(); }
  const std::string& latents() const { return manifest_["denoiser"]["latents"].text(); }
  // The graphs that the last step has run, such as "full", or "head, then tail" if the head has decided.
  const std::string& ran() const { return ran_; }

  // Returns the guided prediction for `latents` at step `number`; `arguments` are the same for all steps.
  Tensor predict(size_t number, const Tensor& latents, float timestep, double scale, const Tensors& arguments) {
    const Json &step = steps()[number], &phase = step["phase"];
    const Call call{number, latents, timestep, arguments, phase["guided"].is_true()};
    free_early(number);
    Tensor prediction = phase.has("decided") ? decided(step, call) : undecided(step, call);
    if (call.guided) {  // otherwise it is the prediction of both halves
      const Tensor cond = Runtime::half(prediction, cond_half_), uncond = Runtime::half(prediction, 1 - cond_half_);
      prediction = Runtime::sum(1 - scale, uncond, scale, cond);
    }
    const int64_t channels = Runtime::shape(latents).at(1);  // further ones are a learned variance
    if (Runtime::shape(prediction).at(1) == channels) return prediction;
    return Runtime::from(first_channels(Runtime::to(prediction), channels));
  }

 private:
  // A call of the denoiser in step `number`.
  struct Call {
    size_t number;
    const Tensor& latents;
    float timestep;
    const Tensors& arguments;
    bool guided;
  };

  // A value for later steps, computed in step `number`.
  struct Cache {
    Tensor value;
    bool has_halves;
    size_t number;
  };

  // The first output of a graph, and the values that it has returned for later steps, with their specifications.
  struct Result {
    Tensor output;
    std::vector<std::pair<const Json*, Tensor>> emitted;
  };

  // Runs the graph of a step, and keeps what its phase emits and merges.
  Tensor undecided(const Json& step, const Call& call) {
    ran_ = step["graph"].text();
    const Result result = run(ran_, call);
    keep(result, call, names(step["phase"], "emit"), names(step["phase"], "merge"));
    if (decider_) decider_->computed();
    return result.output;
  }

  // Runs the head of a step, and then the tail or the finish, as the measure decides.
  Tensor decided(const Json& step, const Call& call) {
    if (!decider_ || !step.has("tail") || !step.has("finish"))
      throw std::runtime_error("the manifest lacks the rule, the tail or the finish of a step that is decided at run time; "
                               "export the bundle again");
    const std::string& head = step["graph"].text();
    const Result first = run(head, call);
    const bool skipped = decider_->skips(Runtime::to(first.output).data.at(0));
    keep(first, call, {"state"});
    const std::string& served = step[skipped ? "finish" : "tail"].text();
    const Result rest = run(served, call);
    if (!skipped || since_previous_) keep(first, call, {"measured"});
    if (!skipped) keep(rest, call, names(step["phase"], "decided"));
    for (const auto& [spec, value] : first.emitted)
      if ((*spec)["kind"].text() == "state") caches_.erase(key_of(*spec));
    ran_ = head + ", then " + served;
    return rest.output;
  }

  // Runs the graph `name`, after its prelude and its table if necessary.
  Result run(const std::string& name, const Call& call) {
    const Json& graph = manifest_["graphs"][name];
    run_early(name, call);
    std::vector<Tensor> inputs = own_inputs(graph, call);
    for (const Json& spec : listed(graph, "early_inputs")) inputs.push_back(early_value(name, spec["name"].text(), call));
    for (const Json& spec : graph["cache_inputs"].items()) inputs.push_back(cached(spec, call));
    const std::vector<Tensor> outputs = runtime_.run(name, std::move(inputs));
    Result result{outputs.at(0), {}};
    size_t position = graph["outputs"].items().size();
    for (const Json& spec : graph["cache_outputs"].items()) result.emitted.emplace_back(&spec, outputs.at(position++));
    return result;
  }

  // Keeps the values of these kinds; `merged` are those of values that are merged over the halves. Older values stay if a
  // forecast needs them, except those of other halves and, where steps are decided, from before a gate.
  void keep(const Result& result, const Call& call, const std::set<std::string>& kinds,
            const std::set<std::string>& merged = {}) {
    for (const auto& [spec, value] : result.emitted) {
      const std::string& kind = (*spec)["kind"].text();
      const bool is_merged = (*spec)["merged"].is_true();
      if (!(is_merged ? merged : kinds).count(kind)) continue;
      const Cache cache{value, call.guided && !is_merged, call.number};
      std::vector<Cache> kept = {cache};
      for (const Cache& older : caches_[key_of(*spec)]) {
        const bool counts = !decider_ || is_gated(older.number) == is_gated(call.number);
        if (counts && older.has_halves == cache.has_halves && kept.size() <= order_of(kind)) kept.push_back(older);
      }
      caches_[key_of(*spec)] = std::move(kept);
    }
  }

  bool is_gated(size_t number) const { return names(steps()[number]["phase"], "reuse").count("cross") > 0; }

  // Returns a cached value as an input of a graph: the last one, or a forecast from the last ones.
  Tensor cached(const Json& spec, const Call& call) const {
    const Json& step = steps()[call.number];
    const std::string& kind = spec["kind"].text();
    const auto found = caches_.find(key_of(spec));
    const std::vector<Cache> kept = found == caches_.end() ? std::vector<Cache>() : found->second;
    std::vector<double> weights = weights_of(step, kind);
    if (!kept.empty() && names(step["phase"], "decided").count(kind)) {
      std::vector<size_t> numbers;
      for (const Cache& cache : kept) numbers.push_back(cache.number);
      weights = forecast_weights(numbers, call.number);
    }
    if (kept.size() < weights.size()) throw std::runtime_error("a step needs more values of " + kind + " than were kept");
    std::vector<Tensor> values;
    for (size_t i = 0; i < weights.size(); ++i)
      values.push_back(is_halved(call) && kept[i].has_halves ? Runtime::half(kept[i].value, kept_half_) : kept[i].value);
    return values.size() == 1 ? values[0] : Runtime::weighted(weights, values);
  }

  // Whether guidance has ended, so that only one half is computed.
  bool is_halved(const Call& call) const { return guided_ && !call.guided; }

  static std::pair<std::string, std::string> key_of(const Json& spec) { return {spec["kind"].text(), spec["site"].text()}; }

  // Returns the kinds in the list `key` of a phase, which may be missing.
  static std::set<std::string> names(const Json& phase, const std::string& key) {
    std::set<std::string> found;
    for (const Json& name : listed(phase, key)) found.insert(name.text());
    return found;
  }

  // Returns the weights with which the last values of a kind are added up in a step, newest first: one, if the last value is
  // reused as it is.
  static std::vector<double> weights_of(const Json& step, const std::string& kind) {
    std::vector<double> weights;
    if (step.has("weights") && step["weights"].has(kind))
      for (const Json& weight : step["weights"][kind].items()) weights.push_back(weight.number());
    return weights.empty() ? std::vector<double>{1} : weights;
  }

  // Returns the order of the forecast for the values of a kind; 0 if they are reused as they are.
  size_t order_of(const std::string& kind) const {
    const Json& method = manifest_["method"];
    if (!method.has("forecasts") || !method["forecasts"].has(kind)) return 0;
    return static_cast<size_t>(method["forecasts"][kind].integer());
  }

  // Returns the list `key`, which is missing in bundles of older schema versions.
  static std::vector<Json> listed(const Json& from, const std::string& key) {
    return from.has(key) ? from[key].items() : std::vector<Json>();
  }

  // Returns those of a graph's inputs that are arguments of the denoiser.
  std::vector<Tensor> own_inputs(const Json& graph, const Call& call) const {
    std::vector<Tensor> inputs;
    for (const Json& spec : graph["inputs"].items()) {
      const std::string& input = spec["name"].text();
      if (input == latents()) {
        inputs.push_back(call.guided ? Runtime::twice(call.latents) : call.latents);
      } else if (input == "timestep" && spec["shape"].items().empty()) {
        inputs.push_back(Runtime::from({{}, {call.timestep}}));
      } else if (input == "timestep") {  // one for each row
        const int64_t rows = Runtime::shape(call.latents).at(0) * (call.guided ? 2 : 1);
        inputs.push_back(Runtime::from({{rows}, std::vector<float>(static_cast<size_t>(rows), call.timestep)}));
      } else {
        const Tensor& argument = call.arguments.at(input);
        inputs.push_back(is_halved(call) ? Runtime::half(argument, kept_half_) : argument);
      }
    }
    return inputs;
  }

  // The values of the prelude of a graph, and those of its table by timestep.
  struct Early {
    Tensors values;
    std::map<float, Tensors> rows;
  };

  // Returns the names of the graphs that step `number` may run.
  std::set<std::string> graphs_of(size_t number) const {
    std::set<std::string> found;
    for (const char* key : {"graph", "tail", "finish"})
      if (steps()[number].has(key)) found.insert(steps()[number][key].text());
    return found;
  }

  // Frees the values of preludes and tables of graphs that no step from `number` on runs.
  void free_early(size_t number) {
    std::set<std::string> needed;
    for (size_t i = number; i < steps().size(); ++i) needed.merge(graphs_of(i));
    for (auto at = early_.begin(); at != early_.end();) at = needed.count(at->first) ? std::next(at) : early_.erase(at);
  }

  // Runs the prelude and the table of the graph `name`, unless their values are known. When the graph is first needed, the
  // prelude runs once, and the table runs for each timestep that the graph may serve, so that a runtime with one graph at a
  // time in memory loads each part once.
  void run_early(const std::string& name, const Call& call) {
    for (const std::string stage : {"prelude", "table"}) {
      const std::string part = part_of(name, stage);
      if (part.empty()) continue;
      Early& early = early_[name];
      if (stage == "prelude" ? !early.values.empty() : early.rows.count(call.timestep) > 0) continue;
      std::set<float> times = {call.timestep};
      if (stage == "table")
        for (size_t i = call.number; i < steps().size() && i < timesteps_.size(); ++i)
          if (graphs_of(i).count(name)) times.insert(timesteps_[i]);
      const Json& graph = manifest_["graphs"][part];
      for (const float time : times) {
        std::vector<Tensor> inputs = own_inputs(graph, {call.number, call.latents, time, call.arguments, call.guided});
        for (const Json& spec : listed(graph, "early_inputs")) inputs.push_back(early.values.at(spec["name"].text()));
        const std::vector<Tensor> outputs = runtime_.run(part, std::move(inputs));
        size_t position = 0;
        for (const Json& spec : graph["outputs"].items())
          (stage == "table" ? early.rows[time] : early.values)[spec["name"].text()] = outputs[position++];
      }
    }
  }

  const Tensor& early_value(const std::string& graph, const std::string& name, const Call& call) const {
    const Early& early = early_.at(graph);
    const auto found = early.values.find(name);
    return found == early.values.end() ? early.rows.at(call.timestep).at(name) : found->second;
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
  std::optional<Decider> decider_;  // if steps are decided at run time
  bool since_previous_ = false;  // whether measures compare with the previous step instead of the last computed one
  std::string ran_;
  std::map<std::string, Early> early_;  // by graph
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
    std::cout << "step " << i << ": " << denoiser.ran() << "\n";
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
