"""How a pipeline's attentions behave over the steps: section 4 of arXiv 2404.02747, for any pipeline."""
