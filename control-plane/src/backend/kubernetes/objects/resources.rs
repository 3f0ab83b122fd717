//! What a session asks for in place of the usual resources, laid over the agent's container last.

use k8s_openapi::{api::core::v1::Pod, apimachinery::pkg::api::resource::Quantity};

use super::AGENT;
use crate::{backend::ResourceOverrides, reconcile::desired::quantity::Amount};

/// Gives the agent's container what the session asks for. A request that is above a limit moves
/// with what was asked for: Kubernetes refuses such a pod.
pub(super) fn override_agent(pod: &mut Pod, wanted: &ResourceOverrides) {
    let containers = pod.spec.iter_mut().flat_map(|spec| &mut spec.containers);
    let Some(agent) = containers.into_iter().find(|it| it.name == AGENT) else {
        return;
    };
    let resources = agent.resources.get_or_insert_default();
    let limits = resources.limits.get_or_insert_default();
    let requests = resources.requests.get_or_insert_default();
    let is_above = |one: Option<&Quantity>, other: Option<&Quantity>| {
        let amount = |it: Option<&Quantity>| Amount::parse(&it?.0);
        matches!((amount(one), amount(other)), (Some(one), Some(other)) if one > other)
    };
    for (name, quantity) in &wanted.limits {
        let quantity = Quantity(quantity.clone());
        if !wanted.requests.contains_key(name) && is_above(requests.get(name), Some(&quantity)) {
            requests.insert(name.clone(), quantity.clone());
        }
        limits.insert(name.clone(), quantity);
    }
    for (name, quantity) in &wanted.requests {
        let quantity = Quantity(quantity.clone());
        if !wanted.limits.contains_key(name) && is_above(Some(&quantity), limits.get(name)) {
            limits.insert(name.clone(), quantity.clone());
        }
        requests.insert(name.clone(), quantity);
    }
}
