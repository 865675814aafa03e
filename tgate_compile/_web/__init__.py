"""The page that runs bundles in a browser: its files, ONNX Runtime's, and a server for this machine."""
