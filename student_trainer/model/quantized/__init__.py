"""QLoRA: a student whose frozen base is kept in 4 bit under adapters that are trained; loads bitsandbytes only where it is asked for."""
