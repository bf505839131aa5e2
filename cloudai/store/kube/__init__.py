"""The store over the Kubernetes API: a Task is a custom resource, a Run is a Pod, a Worker is a Node."""
