"""How it is decided: the policies of this project and what they are made of."""
