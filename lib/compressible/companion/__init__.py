"""The frame of the notebooks: cached runs, parameters, presets, batch, figures, provenance and claims."""
