"""What text to image rests on: pipelines and the stand-in, texts and prompts, captioned pictures, drawn scenes, autoencoders."""
