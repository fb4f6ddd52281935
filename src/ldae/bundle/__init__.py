"""The exported model: one folder of configs and safetensors, written and read strictly."""
