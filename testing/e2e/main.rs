#![forbid(unsafe_code)]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a test: its output is its product, and a failure is a panic that shows the scene"
)]
//! Sessions on real Kubernetes, from POST to the end of their pods: what `make e2e` runs.
//!
//! `e2e [NAME...]`: the scenarios whose names have one of these in them; all without. They run in
//! order on one cluster: a kubelet on this machine, which wants root, or the cluster of
//! `E2E_KUBECONFIG`. `e2e --images FOLDER` only writes the images.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use ambient_testing::{images::Image, node::needs};
use clap::Parser;

mod chart;
mod harness;
mod kube;
mod leftovers;
mod scenarios;
mod system;
mod target;

use harness::Harness;
use target::Target;

/// Runs sessions on a real Kubernetes.
#[derive(Debug, Parser)]
struct Arguments {
    /// Run only scenarios with one of these in their names.
    names: Vec<String>,
    /// Show the scenarios and run none.
    #[arg(long)]
    list: bool,
    /// Write the images to this folder, as archives, and run nothing.
    #[arg(long, value_name = "FOLDER")]
    images: Option<PathBuf>,
    /// Folder with the static binaries that `make static` makes.
    #[arg(long, value_name = "FOLDER", default_value = "dist")]
    binaries: PathBuf,
    /// Only start a node with a pod and wait: for the scenario that kills this.
    #[arg(long, hide = true)]
    hold: bool,
    /// The cluster to run on, instead of a node on this machine.
    #[arg(long, env = "E2E_KUBECONFIG", value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// This machine's address as that cluster's pods reach it [default: towards its nodes].
    #[arg(long, env = "E2E_ADDRESS", value_name = "ADDRESS")]
    address: Option<std::net::Ipv4Addr>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if let Some(folder) = &arguments.images {
        return write_images(&arguments.binaries, folder);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    if arguments.hold {
        let images = Image::all(&arguments.binaries).expect("the caller has made them");
        runtime.block_on(leftovers::hold(&images));
        return ExitCode::SUCCESS;
    }
    runtime.block_on(run(arguments))
}

async fn run(arguments: Arguments) -> ExitCode {
    let mut harness = Harness::new(arguments.names, arguments.list);
    if arguments.list {
        for name in scenarios::names() {
            harness.wants(name);
        }
        return harness.end();
    }
    let images = if arguments.kubeconfig.is_some() {
        Vec::new()
    } else {
        if let Err(missing) = needs::meet() {
            eprintln!("e2e: {missing}");
            return ExitCode::FAILURE;
        }
        match Image::all(&arguments.binaries) {
            Ok(images) => images,
            Err(error) => {
                eprintln!("e2e: {error}");
                return ExitCode::FAILURE;
            }
        }
    };
    let outside = leftovers::Outside::look();
    let existing = arguments.kubeconfig.is_some();
    if !existing {
        let killed = leftovers::killed(&arguments.binaries);
        harness.run(leftovers::KILLED, killed).await;
    }
    if scenarios::in_order().any(|name| harness.is_named(name)) {
        let target = async {
            match arguments.kubeconfig {
                Some(kubeconfig) => Target::existing(kubeconfig, arguments.address).await,
                None => Target::on_this_machine(&images),
            }
        };
        let Some(target) = harness.set_up("the cluster", target).await else {
            return harness.end();
        };
        println!("{target}");
        if existing {
            println!(
                "the images must be on its nodes: `make images`, then, for kind, `kind load \
                 image-archive FILE` for each"
            );
        }
        if let Some(target) = scenarios::run(&mut harness, target).await
            && !existing
        {
            let ended = leftovers::ended(target, outside);
            harness.run(leftovers::ENDED, ended).await;
        }
    } else {
        for name in scenarios::in_order() {
            harness.wants(name);
        }
    }
    if !existing {
        install(&mut harness, &arguments.binaries).await;
    }
    harness.end()
}

/// The chart, on a node of its own.
async fn install(harness: &mut Harness, binaries: &Path) {
    let names = [chart::guide::NAME, chart::NAME];
    if !names.iter().any(|name| harness.is_named(name)) {
        for name in names {
            harness.wants(name);
        }
        return;
    }
    let node = async { chart::node(binaries) };
    let Some(target) = harness.set_up("a node for the chart", node).await else {
        return;
    };
    let guide_failed = harness
        .run(chart::guide::NAME, chart::guide::holds(&target))
        .await;
    let life_failed = harness.run(chart::NAME, chart::life(&target)).await;
    if guide_failed || life_failed {
        for namespace in [chart::NAMESPACE, chart::PROJECT] {
            println!("{}", target.scene(namespace).await);
        }
    }
}

fn write_images(binaries: &Path, folder: &Path) -> ExitCode {
    let all = Image::of_all_ours(binaries).and_then(|ours| {
        let others = [Image::shell()?, Image::pause()?];
        Ok(ours.into_iter().chain(others).collect::<Vec<_>>())
    });
    let images = match all {
        Ok(images) => images,
        Err(error) => {
            eprintln!("e2e: {error}");
            return ExitCode::FAILURE;
        }
    };
    std::fs::create_dir_all(folder).expect("a folder can be made");
    for image in images {
        match image.write_to(folder) {
            Ok(path) => println!("{}: {}", path.display(), Image::reference(image.name())),
            Err(error) => {
                eprintln!("e2e: {error}");
                return ExitCode::FAILURE;
            }
        }
    }
    ExitCode::SUCCESS
}
