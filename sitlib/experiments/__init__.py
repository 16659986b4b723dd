"""What the notebooks and the pipeline call: train or load a model, judge it, write down the result."""
