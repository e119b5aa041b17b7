"""One step of whole UNets, with softmax attention, the official LinFusion layer and fbila's."""
