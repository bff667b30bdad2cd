"""Building, loading and calling models; knows transformers and peft, not DeepSpeed."""
