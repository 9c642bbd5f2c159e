"""The ground under the core: errors, files that appear whole, typed fields, progress and trackers. No training."""
