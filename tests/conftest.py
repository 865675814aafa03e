"""What holds for every test."""

from __future__ import annotations

import diffusers
import torch
import transformers

# Tiny tensors: threads cost more than they bring, and a busy machine makes them cost far more.
torch.set_num_threads(1)
diffusers.utils.logging.set_verbosity_error()
transformers.utils.logging.set_verbosity_error()
