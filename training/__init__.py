"""Makes `qwen2vl-tiny`: its task, its language, its tokenizer, its training and its outliers."""
