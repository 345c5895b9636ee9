"""Pictures drawn with a model: of classes (`classes`, by a denoiser) and of texts (`prompted`, by a pipeline)."""
