"""The embedded demonstration: a tiny text-to-image pipeline that follows simple captions.

Import from the modules, for example ``from tgate_compile._demo.pipeline import load_demo_pipeline``;
nothing is imported here, so that importing ``tgate_compile`` stays light.
"""
