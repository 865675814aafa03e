// One denoising loop from a bundle of format "aoti", without Python: full graph, then pruned graph.
//
//     denoise BUNDLE INPUTS GUIDANCE_SCALE OUT.npy
//
// INPUTS is a folder that write_inputs.py has made: an .npy file for each argument of the denoiser (under guidance with
// both halves in its batch), for the first latents, for the timesteps, and for the cumulative products of alphas before
// and after each step. The scheduler is DDIM without noise. docs/bundle.md tells what is in a bundle.

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <unistd.h>

#include <cmath>
#include <iostream>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "json.h"
#include "npy.h"

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

// The weights of all graphs: the file's own pages, in memory once.
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

// The denoiser of one generation.
class Denoiser {
 public:
  explicit Denoiser(const std::string& bundle) : manifest_(Json::read(bundle + "/manifest.json")), weights_(bundle) {
    const Json& family = manifest_["family"];
    for (const char* key : {"calls", "interleaved", "repeated", "shared"})
      if (!family[key].items().empty()) throw std::runtime_error(std::string("not in this example: family.") + key);
    kept_half_ = family["order"].items()[0].text() == manifest_["method"]["keep"].text() ? 0 : 1;
    cond_half_ = family["order"].items()[0].text() == "cond" ? 0 : 1;
    guided_ = manifest_["example"]["guided"].is_true();
    for (const Json& step : manifest_["example"]["steps"].items()) {
      const std::string name = step["graph"].text();
      if (graphs_.count(name)) continue;
      const Json& graph = manifest_["graphs"][name];
      auto loader = std::make_unique<AOTIModelPackageLoader>(bundle + "/" + graph["file"].text(), graph["entry"].text());
      auto constants = weights_.tensors(loader->get_constant_fqns());
      loader->load_constants(constants, /*use_inactive=*/false, /*check_full_update=*/true, /*user_managed=*/true);
      graphs_.emplace(name, std::move(loader));
    }
  }

  const Json& manifest() const { return manifest_; }
  const std::vector<Json>& steps() const { return manifest_["example"]["steps"].items(); }
  const std::string& latents() const { return manifest_["denoiser"]["latents"].text(); }

  // The guided prediction for `latents` in step number `number`; `arguments` are those that all steps have.
  at::Tensor predict(size_t number, const at::Tensor& latents, float timestep, double scale,
                     const std::map<std::string, at::Tensor>& arguments) {
    const Json& step = steps()[number];
    const Json& graph = manifest_["graphs"][step["graph"].text()];
    const bool guided = step["phase"]["guided"].is_true();
    const bool halved = guided_ && !guided;

    std::vector<at::Tensor> inputs;
    for (const Json& spec : graph["inputs"].items()) {
      const std::string& name = spec["name"].text();
      at::Tensor value;
      if (name == this->latents()) {
        value = guided ? at::cat({latents, latents}) : latents;
      } else if (name == "timestep") {
        value = at::full({}, timestep);
      } else {
        value = halved ? half(arguments.at(name), kept_half_) : arguments.at(name);
      }
      inputs.push_back(value.to(dtype_called(spec["dtype"].text())).contiguous());
    }
    for (const Json& spec : graph["cache_inputs"].items()) {
      const Cache& cache = caches_.at({spec["kind"].text(), spec["site"].text()});
      inputs.push_back(halved && cache.has_halves ? half(cache.value, kept_half_) : cache.value);
    }

    std::vector<at::Tensor> outputs = graphs_.at(step["graph"].text())->boxed_run(std::move(inputs));
    size_t position = graph["outputs"].items().size();
    for (const Json& spec : graph["cache_outputs"].items()) {
      const bool merged = spec["merged"].is_true();
      if (names(step["phase"][merged ? "merge" : "emit"]).count(spec["kind"].text()))
        caches_[{spec["kind"].text(), spec["site"].text()}] = {outputs[position], guided && !merged};
      ++position;
    }
    if (!guided) return outputs[0];  // it stands for both halves: guidance of a prediction with itself
    const at::Tensor uncond = half(outputs[0], 1 - cond_half_);
    return uncond + scale * (half(outputs[0], cond_half_) - uncond);
  }

 private:
  struct Cache {
    at::Tensor value;
    bool has_halves;
  };

  static at::Tensor half(const at::Tensor& value, int position) { return value.chunk(2)[position].contiguous(); }

  static std::set<std::string> names(const Json& list) {
    std::set<std::string> found;
    for (const Json& name : list.items()) found.insert(name.text());
    return found;
  }

  Json manifest_;
  Weights weights_;
  std::map<std::string, std::unique_ptr<AOTIModelPackageLoader>> graphs_;
  std::map<std::pair<std::string, std::string>, Cache> caches_;  // by kind and site
  int kept_half_ = 0, cond_half_ = 1;
  bool guided_ = false;
};

// One step of DDIM without noise, from the cumulative product of alphas `now` to that after the step.
at::Tensor ddim(const at::Tensor& latents, const at::Tensor& prediction, double now, double next,
                const std::string& prediction_type) {
  at::Tensor noise = prediction;
  at::Tensor clean = (latents - std::sqrt(1 - now) * prediction) / std::sqrt(now);
  if (prediction_type == "v_prediction") {
    clean = std::sqrt(now) * latents - std::sqrt(1 - now) * prediction;
    noise = std::sqrt(now) * prediction + std::sqrt(1 - now) * latents;
  } else if (prediction_type != "epsilon") {
    throw std::runtime_error("no prediction type " + prediction_type + " in this example");
  }
  return std::sqrt(next) * clean + std::sqrt(1 - next) * noise;
}

int main(int count, char** given) {
  if (count != 5) {
    std::cerr << "usage: denoise BUNDLE INPUTS GUIDANCE_SCALE OUT.npy\n";
    return 2;
  }
  const std::string bundle = given[1], inputs = given[2], out = given[4];
  const double scale = std::stod(given[3]);
  try {
    const c10::InferenceMode no_gradients;
    Denoiser denoiser(bundle);
    at::Tensor latents = read_npy(inputs + "/latents.npy");
    const at::Tensor timesteps = read_npy(inputs + "/timesteps.npy"), alphas = read_npy(inputs + "/alphas.npy");
    std::map<std::string, at::Tensor> arguments;
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
      const auto index = static_cast<int64_t>(i);
      const at::Tensor prediction = denoiser.predict(i, latents, timesteps[index].item<float>(), scale, arguments);
      const double now = alphas[index][0].item<double>(), next = alphas[index][1].item<double>();
      latents = ddim(latents, prediction, now, next, prediction_type);
      std::cout << "step " << i << ": " << denoiser.steps()[i]["graph"].text() << "\n";
    }
    write_npy(out, latents);
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
