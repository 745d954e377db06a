"""The search for better parameters, of MLlib estimators and of the network alike."""
