"""Where a run is followed and shown beside the console: trackers, the model card, the Hugging Face hub."""
