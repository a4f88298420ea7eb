"""Where people put an adapter: a registry of models that hold one and of trainers, one file for each library's door."""
