"""The core: engine, stages, runs, players, objectives, observed models. It knows no domain and no method."""
