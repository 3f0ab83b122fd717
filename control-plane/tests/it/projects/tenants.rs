//! Mode `mpp`: the test plays the tenant operator, on a cluster of its own as the rules differ.

use ambient_control_plane::backend::kubernetes::settings::Vertex;

use ambient_control_plane::rules::RuleSettings;
use ambient_testing::cluster::ClusterOptions;

use super::*;

const CONFIG: &str = "ambient-code--config";

const TENANT_NAMESPACES: &str = "\
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: tenantnamespaces.tenant.paas.redhat.com}
spec:
  group: tenant.paas.redhat.com
  scope: Namespaced
  names: {kind: TenantNamespace, plural: tenantnamespaces, singular: tenantnamespace}
  versions:
  - name: v1alpha1
    served: true
    storage: true
    schema:
      openAPIV3Schema:
        type: object
        properties:
          spec:
            type: object
            required: [type]
            properties:
              type: {type: string, enum: [build, runtime]}
              network: {type: object, properties: {security-zone: {type: string}}}
          status: {type: object, x-kubernetes-preserve-unknown-fields: true}
";

fn tenant_path(name: &str) -> String {
    format!("/apis/tenant.paas.redhat.com/v1alpha1/namespaces/{CONFIG}/tenantnamespaces/{name}")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_tenant_operator_makes_the_namespaces_that_we_ask_for() {
    let cluster = Cluster::start(ClusterOptions::default());
    let mut settings = settings(permissions::NAMESPACE);
    settings.platform = Platform::Mpp {
        config_namespace: CONFIG.to_owned(),
    };
    settings.images.pull_namespace = Some("images".to_owned());
    settings.model_access.vertex = Some(Vertex {
        secret: Some(SecretRef {
            namespace: "cloud".to_owned(),
            name: "vertex".to_owned(),
        }),
        ..Vertex::default()
    });
    permissions::grant_for(&cluster, &RuleSettings::from(&settings));
    cluster.apply(TENANT_NAMESPACES);
    cluster.apply(
        "\
apiVersion: v1
kind: Secret
metadata: {name: vertex, namespace: cloud}
stringData: {key.json: '{}'}
",
    );
    cluster.wait_for(
        &format!("/apis/tenant.paas.redhat.com/v1alpha1/namespaces/{CONFIG}/tenantnamespaces"),
        |_| true,
    );
    let (_folder, real) = api().await;
    let scene = Scene::start(&real, &cluster, settings).await;

    create_project(&real, "team").await;
    let asked = cluster.wait_for(&tenant_path("team"), |_| true);
    assert_eq!(asked["spec"]["type"], "runtime");
    let namespace = "ambient-code--team";
    assert!(cluster.get(&namespace_path(namespace)).is_none());
    cluster.create_namespace(namespace);

    let vertex = format!("/api/v1/namespaces/{namespace}/secrets/vertex");
    let copy = cluster.wait_for(&vertex, |_| true);
    assert_eq!(copy["data"]["key.json"], "e30=");
    wait_furnished(&cluster, namespace);
    let puller = format!(
        "{}/ambient-image-puller-{namespace}",
        bindings_path("images")
    );
    let puller = || cluster.get(&puller);
    let bound = puller().unwrap();
    assert_eq!(bound["roleRef"]["name"], "system:image-puller");
    assert_eq!(
        bound["subjects"][0]["name"],
        format!("system:serviceaccounts:{namespace}")
    );
    let made = cluster.wait_for(&namespace_path(namespace), |it| {
        it["metadata"]["annotations"]["ambient-code.io/follows-project"] == "true"
    });
    assert!(made["metadata"]["annotations"]["ambient-code.io/created-by"].is_null());
    assert_eq!(scene.projects.ensure("team").await.unwrap(), namespace);

    // A namespace that the tenant has made by itself is used, and never asked back.
    let own = json!({
        "apiVersion": "tenant.paas.redhat.com/v1alpha1", "kind": "TenantNamespace",
        "metadata": {"name": "kept"}, "spec": {"type": "runtime"},
    });
    let path = tenant_path("kept").replace("/kept", "");
    assert_eq!(cluster.request("POST", &path, Some(&own)).0, 201);
    cluster.create_namespace("ambient-code--kept");
    create_project(&real, "kept").await;
    wait_furnished(&cluster, "ambient-code--kept");
    delete_project(&real, "kept").await;
    cluster.wait_gone(&policy_path("ambient-code--kept"));

    delete_project(&real, "team").await;
    cluster.wait_gone(&tenant_path("team"));
    until("nothing is pulled any more", || puller().is_none()).await;
    // That is for the operator to delete.
    for kept in [namespace, "ambient-code--kept"] {
        let kept = cluster.get(&namespace_path(kept)).unwrap();
        assert!(kept["metadata"]["deletionTimestamp"].is_null(), "{kept:#}");
    }
    assert!(cluster.get(&tenant_path("kept")).is_some());
    scene.stop().await;
    real.stop().await;
    let ours = cluster.requests();
    let ours = ours.iter().filter(|it| it.user == CONTROL_PLANE.name);
    assert_eq!(
        ours.filter(|it| it.resource == "namespaces" && it.verb != "patch")
            .filter(|it| !matches!(it.verb.as_str(), "get" | "list" | "watch"))
            .count(),
        0
    );
}
