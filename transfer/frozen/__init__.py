"""What the features of a frozen encoder are worth: probes and neighbours, without fine-tuning."""
