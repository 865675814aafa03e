"""The page that runs bundles in a browser: its files, those of ONNX Runtime, and a local server."""
