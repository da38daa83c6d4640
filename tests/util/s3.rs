//! An S3 server on loopback whose buckets are directories. `s3s` speaks the protocol and checks the signatures.

use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use s3s::auth::SimpleAuth;
use s3s::service::{S3Service, S3ServiceBuilder};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;
use tempfile::TempDir;
use tokio::net::{TcpListener, TcpSocket};
use tokio::runtime::{Builder as RuntimeBuilder, Runtime};

pub const BUCKET: &str = "mail";
const KEY: &str = "spooltap";
const SECRET: &str = "only for tests";

pub struct S3 {
    root: TempDir,
    address: SocketAddr,
    service: S3Service,
    running: Option<Runtime>,
}

impl S3 {
    /// With one empty bucket.
    pub fn start() -> anyhow::Result<Self> {
        let root = tempfile::tempdir()?;
        std::fs::create_dir(root.path().join(BUCKET))?;
        let files = s3s_fs::FileSystem::new(root.path()).map_err(|error| anyhow::anyhow!("{error:?}"))?;
        let mut service = S3ServiceBuilder::new(files);
        service.set_auth(SimpleAuth::from_single(KEY, SECRET));
        let mut server = Self { root, address: ([127, 0, 0, 1], 0).into(), service: service.build(), running: None };
        server.go_on()?;
        Ok(server)
    }

    /// At the same address as before.
    pub fn go_on(&mut self) -> anyhow::Result<()> {
        let runtime = RuntimeBuilder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let listener = runtime.block_on(async {
            let socket = TcpSocket::new_v4()?;
            socket.set_reuseaddr(true)?;
            socket.bind(self.address)?;
            socket.listen(64)
        })?;
        self.address = listener.local_addr()?;
        runtime.spawn(serve(listener, self.service.clone()));
        self.running = Some(runtime);
        Ok(())
    }

    /// Nothing answers any more, requests on their way included.
    pub fn stop(&mut self) {
        if let Some(runtime) = self.running.take() {
            // Waits for the listener to be closed, or the address would still be in use.
            runtime.shutdown_timeout(Duration::from_secs(5));
        }
    }

    /// The variables by which a program reaches it.
    pub fn variables(&self) -> Vec<(&'static str, String)> {
        vec![
            ("AWS_ACCESS_KEY_ID", KEY.to_owned()),
            ("AWS_SECRET_ACCESS_KEY", SECRET.to_owned()),
            ("AWS_REGION", "us-east-1".to_owned()),
            ("AWS_ENDPOINT", format!("http://{}", self.address)),
            ("AWS_ALLOW_HTTP", "true".to_owned()),
        ]
    }

    /// Where the server keeps what is in a folder of the bucket.
    pub fn folder(&self, name: &str) -> PathBuf {
        self.root.path().join(BUCKET).join(name)
    }
}

impl Drop for S3 {
    fn drop(&mut self) {
        self.stop();
    }
}

async fn serve(listener: TcpListener, service: S3Service) {
    while let Ok((socket, _)) = listener.accept().await {
        let http = Builder::new(TokioExecutor::new());
        let service = service.clone();
        tokio::spawn(async move {
            let _ = http.serve_connection(TokioIo::new(socket), service).await;
        });
    }
}
