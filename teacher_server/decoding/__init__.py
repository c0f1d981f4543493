"""Policy of writing text token by token: which sequences run, in what memory. Knows no backend, no Ray and no torch."""
