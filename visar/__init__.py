"""visar: visual autoregressive image generation. Tokenizers, generators and samplers behind one small interface."""
