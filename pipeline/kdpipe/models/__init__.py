"""Small models that can be read in one sitting; anything else comes by import path."""
