"""The networks. Every file here travels to the Hub with the weights, so each imports only its siblings."""
