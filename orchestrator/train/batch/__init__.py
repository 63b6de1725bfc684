"""What a change of batch needs: the noise of the gradient, and learning-rate rules. Nothing is re-exported here."""
