"""L-GreCo: layer-wise adaptive gradient compression."""
