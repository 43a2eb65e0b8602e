"""Other people's training loops on hotloop's step; each an extra, each thin. Imports nothing.

- ``lightning``: ``Trainer(strategy=HotloopStrategy())`` for an unmodified ``LightningModule``.
- ``transformers``: ``HotloopTrainer`` in place of ``Trainer``.
- ``skorch``: ``HotloopClassifier``, ``HotloopRegressor`` and their likes.

The framework's own loss (``training_step``, ``compute_loss``, ``get_loss``) is what is recorded.
What a framework does beside the step stays its own; where hotloop cannot tell that it would come to
the same, the framework's own step is made, and ``reason`` says why.
"""
