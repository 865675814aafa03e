"""When attentions settle."""
