"""The small byte-level Llama shipped with the project: data, training and evaluation."""
