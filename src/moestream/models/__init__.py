"""Model graphs: configuration and tensor names per ``model_type``, blocks written once, states, batch and loader."""
