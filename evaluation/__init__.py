"""The evaluation of a trained model: numbers, figures, and a page of both."""
