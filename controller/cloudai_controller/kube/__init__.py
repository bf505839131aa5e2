"""The controller on Kubernetes: the same reconcile over Tasks and Pods; the kube-scheduler places, the kubelet runs."""
