"""From a batch to a loss and metrics: a task knows the data's meaning, the trainer does not."""
