"""RoBERTa and BERT encoders, and their fine-tuning on GLUE."""
