"""Labels of several teachers about one micro-batch: how each is asked, what happens while one is away, what the joined answer is, and its ledger."""
