"""The outside world: models, data, tasks, training, evaluation, memory."""
