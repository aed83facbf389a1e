"""The learning study: what each way of selecting and of exploring learns per CPU-second, tuned alike."""
