"""The embedded demonstration: a tiny text-to-image pipeline that follows simple captions.

Nothing is imported here, to keep ``import tgate_compile`` fast. Import from the modules, for example
``from tgate_compile._demo.pipeline import load_demo_pipeline``.
"""
