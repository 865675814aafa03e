// Runs the denoiser of a bundle of format "coreml" for one generation. It loads the package's functions by name, keeps
// the caches from step to step, and follows the manifest (docs/reference/bundle.md).
//
// This file has never been compiled, because no Mac was available when it was written. It makes one call for both
// guidance halves, like most pipelines, and unloads the full function once it is no longer needed.
//
// iOS 18 or macOS 15, and later. In an app, compile the package beforehand: xcrun coremlcompiler compile.

import CoreML
import Foundation

struct Manifest: Decodable {
    struct Spec: Decodable { let name: String }
    struct CacheInput: Decodable { let name: String, kind: String, site: String }
    struct CacheOutput: Decodable { let name: String, kind: String, site: String, merged: Bool }
    struct Phase: Decodable { let guided: Bool, emit: [String], merge: [String] }
    struct Graph: Decodable {
        let file: String, entry: String, stage: String?
        let inputs: [Spec], cache_inputs: [CacheInput], outputs: [Spec], cache_outputs: [CacheOutput]
    }
    struct Step: Decodable { let graph: String, phase: Phase, weights: [String: [Float]]? }
    struct Example: Decodable { let guided: Bool, steps: [Step] }
    struct Family: Decodable { let order: [String] }
    struct Rule: Decodable { let threshold: Double }
    struct Method: Decodable { let keep: String, forecasts: [String: Int]?, rule: Rule? }

    let schema_version: Int
    let graphs: [String: Graph], example: Example, family: Family, method: Method
}

/// Returns Core ML's name of an input, output or function that is called `name` in the manifest.
func featureName(_ name: String) -> String {
    String(name.map { $0.isASCII && ($0.isLetter || $0.isNumber) ? $0 : "_" })
}

final class Denoiser {
    let manifest: Manifest
    private let package: URL  // compiled
    private var loaded: (name: String, model: MLModel)?
    /// The last values of each site, newest first; more than one if they are forecast.
    private var caches: [String: [(value: MLMultiArray, hasHalves: Bool)]] = [:]

    init(bundle: URL, compiledPackage: URL) throws {
        let json = try Data(contentsOf: bundle.appendingPathComponent("manifest.json"))
        manifest = try JSONDecoder().decode(Manifest.self, from: json)
        precondition(
            manifest.method.rule == nil,
            "The steps of this bundle are decided at run time (method.rule), but this example runs exactly one graph per "
                + "step. examples/cpp/loop.h shows how to decide.")
        precondition(manifest.schema_version <= 3, "The bundle has a newer schema version.")
        // A bundle that was exported with binding_times=True has preludes and tables, which this example does not run.
        precondition(manifest.graphs.values.allSatisfy { ($0.stage ?? "step") == "step" })
        package = compiledPackage
    }

    /// Returns the prediction of a step. `arguments` contain both halves, by their names in the manifest; a timestep has
    /// shape [1]. After guidance has stopped, the result has one half, which is the prediction of both.
    func callAsFunction(step number: Int, arguments: [String: MLMultiArray]) throws -> MLMultiArray {
        let step = manifest.example.steps[number]
        let graph = manifest.graphs[step.graph]!
        let halved = manifest.example.guided && !step.phase.guided
        var features: [String: Any] = [:]
        for spec in graph.inputs {
            let value = arguments[spec.name]!
            // Only a timestep has no batch dimension with both halves here; docs/reference/bundle.md lists the exceptions.
            features[featureName(spec.name)] = halved && value.shape.count > 1 ? try half(value) : value
        }
        for spec in graph.cache_inputs {
            let weights = step.weights?[spec.kind] ?? [1]
            let values = try caches[spec.kind + " " + spec.site]!.prefix(weights.count).map {
                halved && $0.hasHalves ? try half($0.value) : $0.value
            }
            features[featureName(spec.name)] = weights.count == 1 ? values[0] : weighted(weights, values)
        }
        let given = try MLDictionaryFeatureProvider(dictionary: features)
        let results = try model(step.graph, graph).prediction(from: given)
        for spec in graph.cache_outputs {
            guard (spec.merged ? step.phase.merge : step.phase.emit).contains(spec.kind) else { continue }
            let value = results.featureValue(for: featureName(spec.name))!.multiArrayValue!
            let kept = [(value, step.phase.guided && !spec.merged)] + (caches[spec.kind + " " + spec.site] ?? [])
            caches[spec.kind + " " + spec.site] = Array(kept.prefix((manifest.method.forecasts?[spec.kind] ?? 0) + 1))
        }
        return results.featureValue(for: featureName(graph.outputs[0].name))!.multiArrayValue!
    }

    /// Loads a function. Only one is in memory at a time, because T-GATE changes it once per image.
    private func model(_ name: String, _ graph: Manifest.Graph) throws -> MLModel {
        if let loaded, loaded.name == name { return loaded.model }
        loaded = nil
        let configuration = MLModelConfiguration()
        configuration.functionName = graph.entry
        configuration.computeUnits = .all
        let model = try MLModel(contentsOf: package, configuration: configuration)
        loaded = (name, model)
        return model
    }

    /// Returns the sum of `values` with these weights, in single precision.
    private func weighted(_ weights: [Float], _ values: [MLMultiArray]) -> MLMultiArray {
        let scalars = values.map { MLShapedArray<Float>($0).scalars }
        let sums = scalars[0].indices.map { i in zip(weights, scalars).reduce(Float(0)) { $0 + $1.0 * $1.1[i] } }
        return MLMultiArray(MLShapedArray<Float>(scalars: sums, shape: values[0].shape.map(\.intValue)))
    }

    /// Returns the rows of the half that continues. The halves follow one another, in the order of the family.
    private func half(_ value: MLMultiArray) throws -> MLMultiArray {
        let position = manifest.family.order.firstIndex(of: manifest.method.keep)!
        var shape = value.shape.map(\.intValue)
        shape[0] /= 2
        let rows = MLShapedArray<Float>(value)[(position * shape[0])..<((position + 1) * shape[0])]
        return MLMultiArray(MLShapedArray<Float>(scalars: rows.scalars, shape: shape))
    }
}
